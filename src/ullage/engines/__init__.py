"""The rules of each framework, with the version and the file they mirror."""
