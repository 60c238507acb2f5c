"""Facts in, plan out: pure arithmetic, no I/O, clock, randomness or logging."""
