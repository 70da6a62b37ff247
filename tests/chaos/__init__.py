"""The chaos proof: schedulers under seeded faults, and a checker that reads only what was left behind."""
