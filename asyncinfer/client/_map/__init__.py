"""Many rows through one model: `map` and `map_frame`."""
