"""The checks of the doctor: pure functions of a case."""
