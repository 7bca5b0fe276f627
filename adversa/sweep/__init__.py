"""Data regimes x arms x ratios x seeds: trials, dose-response, report."""
