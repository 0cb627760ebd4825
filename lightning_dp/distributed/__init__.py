"""What several processes have to agree on, divide among themselves, and say when one is lost."""
