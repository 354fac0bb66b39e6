"""What went wrong and what to do about it -> an exception that the command line prints alone."""


class UserError(ValueError):
    """A fault the user can mend: a file, a line, a key, an argument.

    The message names what was wrong, what was expected, what came and what to do. The command line
    prints it without a traceback; everything else that is raised is a bug of ours.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: a scheduler takes the machine back, or the time of a job is over.

    What was done is saved as after Ctrl-C, but the exit status is another one
    (`cli.main.TERMINATED`), by which launchers know that the command is to be started again.
    """


class KeyedError(ValueError):
    """Raised by the validator of a section about a key below it, so that the key's line is named.

    Attributes:
      key: the way to it from the section: ("stages", "sft", "data").
    """

    def __init__(self, key: tuple[str | int, ...], message: str):
        super().__init__(message)
        self.key = key
