"""Move bytes: the engine, the checks of the bytes that pass, and the output folder."""
