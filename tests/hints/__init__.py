"""Every hint, and what becomes of an input when somebody does what the hint says."""
