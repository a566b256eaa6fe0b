"""What only a checkout has: synthetic models, the Arm machine, other projects' encoders. The wheel
leaves this folder out, and nothing shipped imports it.
"""
