"""What single scenes of other packages need."""
