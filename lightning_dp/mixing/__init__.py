"""Whether anything of the user lets one example into the gradient of another: found before the first step."""
