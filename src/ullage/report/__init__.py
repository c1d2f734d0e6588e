"""Results for people and for programs. No arithmetic beyond units."""
