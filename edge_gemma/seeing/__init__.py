"""Pictures, clips and cameras → soft tokens."""
