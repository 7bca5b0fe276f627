"""From a user's pictures to examples with ids, groups and roles. No torch, no ray."""
