"""A stand-in for torchtune where it is not installed: see modules/peft."""
