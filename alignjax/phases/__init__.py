"""One file per phase of training: what it collects, what it minimises, what it leaves behind."""
