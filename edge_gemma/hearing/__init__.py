"""Sound from files and microphones → log-mel → soft tokens, as a stream."""
