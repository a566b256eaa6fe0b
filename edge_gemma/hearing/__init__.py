"""Sound → log-mel → soft tokens, as a stream; a file is a microphone that never waits."""
