"""The networks of the SDXL family, by hand. They know nothing of schedules or files."""
