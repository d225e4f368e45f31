"""The only home of ray. Thin: decisions are made elsewhere, here they happen."""
