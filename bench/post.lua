-- For wrk with one thread: sends ready-made HTTP requests from a file, each once.
-- Arguments: the file, the length of a request, how many requests to skip.

local file, size

function init(args)
   size = tonumber(args[2])
   file = assert(io.open(args[1], "rb"))
   file:seek("set", size * tonumber(args[3]))
end

function request()
   local text = file:read(size)
   if not text then
      io.stderr:write("post.lua: no unsent events are left\n")
      os.exit(3)
   end
   return text
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '\n{"answers": %d, "refused": %d, "broken": %d, "seconds": %f, "p50": %f, "p99": %f}\n',
      summary.requests, errors.status,
      errors.connect + errors.read + errors.write + errors.timeout,
      summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
