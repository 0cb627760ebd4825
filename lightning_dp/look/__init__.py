"""Everything that is tried or refused before the first step."""
