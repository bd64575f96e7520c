"""The two changes of the store, as Lua scripts: each happens as a whole or not at all.

Both return ``{outcome, active version}`` and may be repeated, as a client does after a lost reply.
A server without memory refuses scripts at their first growing write (SET, ZADD, XADD), but not
after RENAME or PERSIST: starting with these, neither script ever stops half way, and
publishing what was staged and rolling back work on a full server too.
"""

PUBLISH = """
local active_key, history, events, staged, published = unpack(KEYS)
local version, activate, compare, expected = ARGV[1], ARGV[2] == '1', ARGV[3] == '1', ARGV[4]
local keep, version_prefix, grace_s, max_events = tonumber(ARGV[5]), ARGV[6], ARGV[7], ARGV[8]
local active = redis.call('GET', active_key) or ''

if redis.call('EXISTS', published) == 1 then return {'ok', active} end  -- a repetition
if activate and compare and active ~= expected then
  redis.call('UNLINK', staged)
  return {'conflict', active}
end
if redis.call('EXISTS', staged) == 0 then return {'missing', active} end

redis.call('RENAME', staged, published)
redis.call('PERSIST', published)
local newest = redis.call('ZREVRANGE', history, 0, 0, 'WITHSCORES')
redis.call('ZADD', history, tonumber(newest[2] or 0) + 1, version)
if activate then
  redis.call('SET', active_key, version)
  active = version
end

local surplus = redis.call('ZCARD', history) - keep
for _, old in ipairs(redis.call('ZRANGE', history, 0, -1)) do
  if surplus <= 0 then break end
  if old ~= active and old ~= version then
    redis.call('ZREM', history, old)
    redis.call('EXPIRE', version_prefix .. old, grace_s)  -- not DEL: a reader in flight finishes
    surplus = surplus - 1
  end
end

local action = activate and 'activated' or 'published'
redis.call('XADD', events, 'MAXLEN', '~', max_events, '*', 'version', version, 'action', action)
return {'ok', active}
"""

ACTIVATE = """
local active_key, history, events, published = unpack(KEYS)
local version, compare, expected, max_events = ARGV[1], ARGV[2] == '1', ARGV[3], ARGV[4]
local active = redis.call('GET', active_key) or ''

if not redis.call('ZSCORE', history, version) or redis.call('EXISTS', published) == 0 then
  return {'missing', active}
end
if active == version then return {'ok', active} end
if compare and active ~= expected then return {'conflict', active} end

redis.call('PERSIST', published)
redis.call('SET', active_key, version)
redis.call('XADD', events, 'MAXLEN', '~', max_events, '*', 'version', version, 'action', 'activated')
return {'ok', version}
"""
