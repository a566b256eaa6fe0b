"""What a server tells about itself: figures of the last requests (recent.py), alerts (alerts.py),
samples of quality (quality.py). ../metrics.py has the same for Prometheus.
"""
