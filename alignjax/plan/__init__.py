"""A config and a topology -> what its programs need and how long they take, without hardware."""
