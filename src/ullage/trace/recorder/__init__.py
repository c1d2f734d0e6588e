"""The recording: events, and the mode that writes them down operator by operator."""
