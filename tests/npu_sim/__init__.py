"""A simulated CANN: see README.md in this folder."""
