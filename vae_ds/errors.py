"""The exceptions that a user can meet. Each carries one line that says what was found and what would do."""


class UserError(Exception):
    """The user's input is wrong; the command line prints the message alone and exits with 2."""


class ConfigError(UserError):
    """A recipe, a setting, a DeepSpeed configuration or a command-line argument is wrong."""


class DataError(UserError):
    """A text file, a data set or a corpus is missing or unusable."""


class CheckpointError(UserError):
    """A run directory, a checkpoint or an exported model is missing, broken or of another version."""


class Stopped(Exception):  # noqa: N818 - an ending that was asked for, no error
    """A signal asked the run to end; a checkpoint was saved, and the same command resumes. Exit code 75."""


class Failed(Exception):  # noqa: N818 - said of what was tried
    """It was tried and did not come off, for a reason that one line tells: no traceback, exit code 1."""


class StorageError(Failed):
    """What had to be on the disk could not be written."""
