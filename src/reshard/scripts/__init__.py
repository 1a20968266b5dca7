"""The user's commands: each parses its flags and calls the library."""
