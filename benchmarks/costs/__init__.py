"""Time and memory of dynlora, against PEFT and against its own parts."""
