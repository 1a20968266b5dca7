"""Moving bytes: the engine, the checks of what passes, and the output folder that appears whole."""
