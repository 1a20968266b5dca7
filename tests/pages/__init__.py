"""Pages: what they show, in a real browser."""
