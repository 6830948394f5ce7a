# SPDX-License-Identifier: Apache-2.0
"""What all above has in common on tensors, events, representations and arguments: nothing of networks or flows."""
