"""The controller: watches TrainingRuns, says what is wrong and brings them back. Knows no torch."""
