"""What errors of Orbax, TensorStore and JAX say about a checkpoint."""

import jax


def is_out_of_memory(error: BaseException) -> bool:
    """Whether JAX raised an error because a device or its host has too little memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
    )


def unreadable_reason(error: BaseException) -> str:
    """Why a checkpoint could not be read, on one line.

    Raises:
      JaxRuntimeError: the memory did not suffice; the checkpoint may be intact.
    """
    # Orbax reports most errors as an incompatible handler, with the actual error as its cause.
    while error.__cause__ is not None:
        error = error.__cause__
    if is_out_of_memory(error):
        raise error
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Text of an error, short enough for one line of a log."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"
