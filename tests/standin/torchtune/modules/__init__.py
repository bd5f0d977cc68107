"""See peft."""
