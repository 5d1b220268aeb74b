"""The entry of Omniverse Kit: the only module here that imports omni, and only Kit imports it."""

from __future__ import annotations

import omni.ext


class M3POExtension(omni.ext.IExt):
    """Registers M3PO's agent configurations when Kit enables the extension."""

    def on_startup(self, ext_id: str) -> None:
        """Attach M3PO to every registered task.

        Args:
            ext_id: The identifier Kit gives the extension.
        """
        import isaaclab_m3po.registration  # noqa: F401  # importing it registers

    def on_shutdown(self) -> None:
        """Nothing is held, so nothing is released."""
