"""What a step does, as torch: never Lightning."""
