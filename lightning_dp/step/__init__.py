"""What happens T times."""
