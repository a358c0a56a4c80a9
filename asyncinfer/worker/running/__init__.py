"""Running claimed jobs, and storing their outcomes."""
