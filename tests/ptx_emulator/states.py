"""What a lane is doing, as far as the scheduler is concerned."""

READY = 0
BLOCKED = 1  # stands before a gate and looks again when something changes
EXITED = 2
ARRIVED = 3  # counted at a barrier, which releases it when complete
