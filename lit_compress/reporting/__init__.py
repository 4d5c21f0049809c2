"""The page of a run: what its folder holds, the numbers that its loggers wrote, charts, and the HTML around them."""
