"""Device, files, processes, clock and memory: what the method runs on."""
