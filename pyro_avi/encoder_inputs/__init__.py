"""What an encoder reads of a call: observed values, their masks, and the arguments that rows depend on beyond them."""
