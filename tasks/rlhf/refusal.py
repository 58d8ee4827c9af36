"""The one exception that is the user's to mend: shown as a single sentence, exit status 2."""


class InputError(Exception):
    """Bad input: the message is one clear sentence that says what is wrong and what to do."""
