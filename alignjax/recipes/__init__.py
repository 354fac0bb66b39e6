"""Named recipes: graphs of phases, and the worlds with known truth that they are shown in."""
