"""What a GPU has to show: python -m benchmarks.gpu FILE.csv times, python -m benchmarks.gpu.summary FOLDER makes the table. gpu.sh runs both."""
