"""One file per verb of the command line.

A verb's module has `add_arguments(parser)` and `main(args) -> int | None` (the exit status; None is
0) and imports nothing outside the standard library until `main` runs, so that `--help` is instant.
Examples go into `parser.epilog`, printed as written. The fault of a user is a `UserError`.
"""
