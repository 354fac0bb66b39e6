"""The training machinery that knows no loss by name: state, step, loop, checkpoints, metrics."""
