"""Values of PEFT's `init_lora_weights` that initialize an adapter from the base weights."""

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base(start: object) -> bool:
    """Return whether an initialization moves part of the base weights into the adapter.

    PEFT repeats it when it loads the adapter, at the saved rank.

    Args:
        start: `init_lora_weights` of a `LoraConfig`.
    """
    return str(start).lower().startswith(_BASE_CHANGING)
