-- For wrk: posts the files of the directory BODIES in turn, as CONTENT_TYPE; prints what it found as JSON.

local requests, turn = {}, 0

function init(_)
  local directory = os.getenv("BODIES")
  local headers = { ["Content-Type"] = os.getenv("CONTENT_TYPE") }
  local listing = io.popen("ls -p '" .. directory .. "' | grep -v /")
  for name in listing:lines() do
    local file = assert(io.open(directory .. "/" .. name, "rb"))
    requests[#requests + 1] = wrk.format("POST", nil, headers, file:read("*a"))
    file:close()
  end
  listing:close()
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, _)
  local errors = summary.errors
  local lost = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '{"answers": %d, "not_ok": %d, "lost": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f}\n',
    summary.requests, errors.status, lost, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
