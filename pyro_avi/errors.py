"""Errors whose message is final."""

__all__ = ["CallError"]


class CallError(ValueError):
    """What is wrong with a call of a model or guide, in a sentence of this package alone.

    ``poutine.trace`` raises an error of a traced function again, of the same class and with its table of shapes behind the
    message. That table is empty or of no use where the message says what to do, and is left out.

    Args:
        message: the sentence.
    """

    def __init__(self, message: str):
        super().__init__(str(message).partition("\n Trace Shapes:")[0])
