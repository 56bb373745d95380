"""The one error that fl_jax raises for what its user can put right."""


class FlJaxError(ValueError):
    """Bad input or a bad environment: the message is one sentence that says what is wrong and what to do."""
